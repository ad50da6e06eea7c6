"""Vision-language models: their KV geometry, visual spans, supported families, loading."""
