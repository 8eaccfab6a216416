"""What Prometheus is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

from llm_from_scratch.generate.settings import SamplingSettings
from llm_from_scratch.serve.models import ServedModel
from llm_from_scratch.serve.service import make_service


def test_texts_and_tokens_are_counted(writer: Callable[..., ServedModel]) -> None:
    served = writer()
    service = make_service({"tiny": served})
    settings = SamplingSettings(max_new_tokens=5, temperature=0.0, n=2)

    async def write() -> None:
        service.worker.start()
        async for _ in service.worker.write("tiny", [[5] * 20], settings):
            pass

    asyncio.run(write())
    assert service.worker.stop()
    families = text_string_to_metric_families(service.metrics.page().decode())
    samples = [sample for family in families for sample in family.samples]
    found = {sample.name.removeprefix("scratchlm_"): sample for sample in samples}
    values = {name: sample.value for name, sample in found.items()}
    assert values["new_tokens_total"] == 10
    assert values["prompt_tokens_total"] == 20
    assert values["steps_total"] == service.worker.desks["tiny"].steps >= 5
    assert values["texts_total"] == 2
    assert found["texts_total"].labels == {"model": "tiny", "finish_reason": "length"}
    assert values["time_to_first_token_seconds_count"] == 1
    assert values["text_tokens_per_second_count"] == 2
    assert values["running_texts"] == values["waiting_texts"] == values["cache_pages_held"] == 0
    assert values["cache_pages"] == 4096 / 16
    assert values["requests_in_flight"] == 0
