"""Making weights: the optimizer, the corpus, the training run. Read muonclip.py first."""
