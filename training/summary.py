"""What a finished training run prints."""

from typing import Any

from rich.table import Table


def errors_table(metrics: dict[str, Any]) -> Table:
    table = Table(title=f"on {metrics['questions']} held-out questions")
    for column in ("layer", "keys unexplained", "values unexplained", "attention output error"):
        table.add_column(column, justify="right")
    names = ("keys_unexplained", "values_unexplained", "output_error")
    layers = sorted({int(k.split("/")[0].removeprefix("layer")) for k in metrics if k.startswith("layer")})
    for title, under in (*((str(i), f"layer{i}/") for i in layers), ("mean", "")):
        table.add_row(title, *(f"{metrics[under + n]:.4f}" if under + n in metrics else "–" for n in names))
    return table
