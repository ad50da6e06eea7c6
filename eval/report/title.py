"""The title of a result's tables and picture."""

from collections.abc import Mapping
from typing import Any

from ..protocol_names import ASK_LATER
from ..scores.metric_names import DEMO


def title_of(result: Mapping[str, Any]) -> str:
    """Model, data, count of questions, and what is not as usual."""
    metric = result.get("metric", DEMO)
    judged = "" if metric == DEMO else f", judged by {metric}"
    later = ", asked later" if result.get("protocol") == ASK_LATER else ""
    return f"{result['model']} on {result['data']['source']}, {result['rows'][0]['n']} questions{later}{judged}"
