"""Probing an encoder on labelled trials, beside baselines and controls."""
