"""The probe: what an encoder's features are worth on labelled trials, compared with baselines and controls."""
