"""What all routes share: the models, who computes, and what clients may use up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llm_from_scratch.core.errors import nearest, shown
from llm_from_scratch.serve.errors import ApiError
from llm_from_scratch.serve.limits import Limits
from llm_from_scratch.serve.metrics import Metrics
from llm_from_scratch.serve.models import ServedModel
from llm_from_scratch.serve.worker import Worker

__all__ = ["Limits", "Service", "make_service"]


@dataclass
class Service:
    """A server's parts.

    Attributes:
        keys: who brings one of them may use the models; without any, everybody may.
        runs: the folder whose run folders are shown; None for none.
        hosts: the names by which the server may be called (the header Host); None for any.
        origins: other web pages whose scripts may ask.
        draining: whether it shuts down: what runs is finished, nothing new is begun.
        in_flight: how many requests are being answered.
    """

    models: dict[str, ServedModel]
    worker: Worker
    limits: Limits
    keys: tuple[str, ...] = ()
    runs: Path | None = None
    metrics: Metrics = field(default_factory=Metrics)
    hosts: tuple[str, ...] | None = None
    origins: tuple[str, ...] = ()
    draining: bool = False
    in_flight: int = 0

    def model(self, name: str | None, kind: str | None = None) -> ServedModel:
        """The model that clients call `name`, or the first (of a kind) if they do not say.

        Raises `ApiError`: 404 for an unknown one, 400 for one of another kind.
        """
        if not name:
            fitting = [one for one in self.models.values() if kind in (None, one.kind)]
            if fitting:
                return fitting[0]
            verb = {"writer": "writes", "embedder": "embeds"}.get(kind or "", "is here")
            raise ApiError(404, f"This server has no model that {verb}.", code="model_not_found")
        found = self.models.get(name)
        if found is None:
            raise ApiError(
                404,
                f"There is no model {shown(name)} here; there are {', '.join(self.models)}."
                + nearest(name, self.models),
                code="model_not_found",
                param="model",
            )
        if kind not in (None, found.kind):
            does = "embeds texts and writes none" if found.kind == "embedder" else "embeds no texts"
            raise ApiError(400, f"The model {shown(name)} {does}.", param="model")
        return found


def make_service(
    models: Mapping[str, ServedModel],
    limits: Limits | None = None,
    *,
    keys: Sequence[str] = (),
    runs: Path | None = None,
    hosts: Sequence[str] | None = None,
    origins: Sequence[str] = (),
) -> Service:
    """A service for models that are open."""
    limits, metrics = limits or Limits(), Metrics()
    service = Service(
        dict(models),
        Worker(models, limits, metrics),
        limits,
        tuple(keys),
        runs,
        metrics,
        None if hosts is None else tuple(hosts),
        tuple(origins),
    )
    metrics.look_at(service)
    return service
