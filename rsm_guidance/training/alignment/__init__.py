"""Fine-tuning by rewards: published methods as points of one space, estimator x form x time weight x trust region."""
