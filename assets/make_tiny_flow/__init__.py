"""How the flow-matching toy model is made; see assets/train_tiny_flow.py."""
