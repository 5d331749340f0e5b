"""What is refused, and said, when an engine starts."""

from __future__ import annotations

import logging

import pytest
import torch
from engines import attention_of, greedy, tiny_plan, with_plan
from vllm.v1.attention.backend import AttentionType

from tidaldecode import InputError


def test_without_the_option_vllm_stays_as_it_is(start, tiny_llama):
    engine = start(tiny_llama)
    assert not hasattr(_first_impl(engine), "attention")


def _first_impl(engine):
    runner = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    return next(iter(runner.compilation_config.static_forward_context.values())).impl


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (with_plan("smollm2-135m"), "30 layers"),
        (with_plan("no-such-plan"), "no plan 'no-such-plan'"),
        (with_plan("auto"), "tidaldecode calibrate"),
        (with_plan("paper") | {"kv_cache_dtype": "fp8"}, "kv-cache-dtype auto"),
        (
            with_plan("paper") | {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative decoding",
        ),
    ],
    ids=["another model's plan", "unknown plan", "no plan", "fp8", "speculative"],
)
def test_what_can_not_work_is_refused_at_the_start(start, tiny_llama, options, words):
    with pytest.raises(InputError, match=words) as caught:
        start(tiny_llama, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("feature", "words"),
    [
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "soft-capped scores"),
        ({"sinks": torch.zeros(4)}, "sinks"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "the KV cache of another layer"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "encoder_only"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_of_other_kinds_are_refused(feature, words):
    from tidaldecode.vllm.backend import TidalDecodeImpl

    layer = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto"}
    with pytest.raises(InputError, match=words) as caught:
        TidalDecodeImpl(4, 32, 1.0, 2, **(layer | feature))
    assert "\n" not in str(caught.value)


def test_an_untested_vllm_is_refused(monkeypatch):
    import vllm

    from tidaldecode.vllm.parent import check_version

    check_version()
    monkeypatch.setattr(vllm, "__version__", "0.31.0")
    with pytest.raises(InputError, match="0.32 or 0.33, and this is 0.31.0"):
        check_version()


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def test_a_line_says_what_the_plan_does_and_what_was_read(start, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("tidaldecode.vllm.reads._SECONDS", 0)
    handler, logger = _Lines(), logging.getLogger("vllm.tidaldecode")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        engine = start(tiny_llama, **with_plan(tiny_plan(tmp_path, 32, "unified")))
        greedy(engine, [list(range(2, 102))], 4)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    assert sum("1 full layers, 2 select layers, 4 sparse layers" in line for line in handler.lines) == 1
    assert "of the KV cache" in handler.lines[-1]
    assert attention_of(engine).reads.tokens == 3
