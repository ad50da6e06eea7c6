"""What every command that runs a model prepares first: the screen, threads, the seed, the device; and its lines."""

import os

from rich.console import Console

from ..errors import ConfigError

_THREADS = max(64, 4 * (os.cpu_count() or 1))
"""Most CPU threads of a process: PyTorch dies with a hundred thousand."""


def begin(console: Console, *, threads: int | None, seed: int, device: str | None) -> None:
    """Prepare this process for a run.

    Args:
        console: where progress is shown. If it is no terminal, progress bars of transformers and datasets are off.
        threads: CPU threads of PyTorch; None leaves its choice.
        seed: of PyTorch's random numbers.
        device: the device of the run; None leaves the choice to whoever loads the model.

    Raises:
        ConfigError: for a number of threads that cannot be used. ModelError: if the device cannot be used here.
    """
    if threads is not None and not 1 <= threads <= _THREADS:
        raise ConfigError(f"--threads {threads}: give 1 to {_THREADS}, or leave it out for PyTorch's choice.")
    import datasets
    import torch
    import transformers

    from ..vlm.loading import require_device

    require_device(device)
    if not console.is_terminal:
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)


def tell(console: Console, line: str) -> None:
    """Print a line as it is, however narrow the screen; nothing for an empty one."""
    if line:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
