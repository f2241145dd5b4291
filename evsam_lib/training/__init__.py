"""Training: distillation of the encoder (phase 1), end-to-end training (phase 2), and the loop both share."""
