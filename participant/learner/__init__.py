"""Training and evaluation behind one port, `Learner`: over torch, resumable step by step."""
