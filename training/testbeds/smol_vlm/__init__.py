"""Making smol-vlm: SmolLM2-135M-Instruct and EfficientNet-Lite0, both pretrained, and a connector between them that is
trained."""
