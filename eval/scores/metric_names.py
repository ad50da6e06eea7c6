"""The metrics by name; what computes one is imported by the scorer."""

AUTO = "auto"
DEMO = "demo"
METRICS = {
    "exact": "exact:exact",
    "relaxed-exact": "exact:relaxed_exact",
    "anls": "edits:anls",
    "vqa": "vqa:vqa_accuracy",
    "relaxed-accuracy": "relaxed_accuracy:relaxed_accuracy",
    "cer": "edits:character_score",
    "wer": "edits:word_score",
    "multiple-choice": "multiple_choice:multiple_choice",
    DEMO: "demo:demo_score",
}
"""Name to "module:function" in this folder."""
