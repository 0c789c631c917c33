"""A KV connector for vLLM: compressed blocks in a store that several servers share.

`--kv-transfer-config` names `NexusQuantConnector` with `nexusquant.vllm` as its module path
(docs/guides/vllm.md). vLLM is imported when the connector is asked for, so that what needs none of
it can be used and tested without.
"""

from __future__ import annotations

from typing import Any

__all__ = ["NexusQuantConnector"]


def __getattr__(name: str) -> Any:
    if name != "NexusQuantConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nexusquant.vllm.versions import require_vllm

    require_vllm()
    from nexusquant.vllm.connector import NexusQuantConnector

    return NexusQuantConnector
