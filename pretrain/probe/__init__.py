"""The probe measures how well an encoder's features classify labelled trials, compared with baselines and controls."""
