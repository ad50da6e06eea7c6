"""What lmms-eval finds in the group `lmms_eval.models` of entry points: the name of the model, and where its class
is."""

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """The entry of `--model kvcapsule`; nothing of the class is imported before it is chosen."""
    return ModelManifest("kvcapsule", chat_class_path="kvcapsule.eval.lmms.model.CapsuleModel")
