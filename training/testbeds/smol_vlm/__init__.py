"""Training of smol-vlm: pretrained SmolLM2-135M-Instruct and EfficientNet-Lite0 with a trained connector between
them."""
