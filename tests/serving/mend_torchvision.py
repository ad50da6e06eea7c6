"""Lets transformers import a torchvision that was built for another torch: declares the operators that it wants to see.

With vLLM and with lmms-eval, pip brings torchvision as a CUDA build beside a CPU build of torch. Its library cannot be
loaded there, and its import stops at `operator torchvision::nms does not exist`. To uninstall it is no way out: a
module of transformers that vLLM's LLaVA needs imports it, as does lmms-eval. Image processors need none of its compiled
operators. (torchaudio and torchcodec come with vLLM as CUDA builds too; nothing needs them, and the Makefile uninstalls
them.)

Run by `make test-vllm` and `make test-lmms` with the environment's Python; a second run changes nothing.
"""

from importlib.util import find_spec
from pathlib import Path

MARK = "# Added by tests/serving/mend_torchvision.py."
CODE = f"""
{MARK}
if not _has_ops():
    _schemas = torch.library.Library("torchvision", "FRAGMENT")
    _schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def main() -> None:
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    file = Path(spec.origin).with_name("extension.py")
    text = file.read_text(encoding="utf-8")
    if MARK not in text:
        file.write_text(text + CODE, encoding="utf-8")


if __name__ == "__main__":
    main()
