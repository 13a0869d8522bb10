"""Parts of ``dreamscale generate``: choice of the EEG, predictors, and a folder that keeps images after a stop."""
