"""DM-RE2I: EVRNet and the EEG-guided DDPM (doi 10.1016/j.bspc.2023.105125)."""
