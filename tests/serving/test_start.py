"""What is refused, and said, when an engine starts."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from engines import attention_of, greedy, tiny_plan, with_plan
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum

import tidaldecode.vllm
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

    from tidaldecode.vllm.own_backend import check_version

    check_version()
    monkeypatch.setattr(vllm, "__version__", "0.31.0")
    with pytest.raises(InputError, match="0.32 or 0.33, and this is 0.31.0"):
        check_version()


def test_a_plan_in_the_environment_without_the_backend_is_warned_of(monkeypatch):
    from vllm.platforms import current_platform

    seen = []
    monkeypatch.setattr(current_platform, "check_and_update_config", seen.append, raising=False)
    monkeypatch.setenv("TIDALDECODE_PLAN", "auto")
    tidaldecode.vllm.register()
    chosen = SimpleNamespace(attention_config=SimpleNamespace(backend=AttentionBackendEnum.CUSTOM))
    not_chosen = SimpleNamespace(attention_config=SimpleNamespace(backend=None))
    with _lines() as lines:
        current_platform.check_and_update_config(chosen)
        assert lines == []
        current_platform.check_and_update_config(not_chosen)
        current_platform.check_and_update_config(not_chosen)
    assert len(lines) == 1 and "start it with --attention-backend CUSTOM" in lines[0]
    assert seen == [chosen, not_chosen, not_chosen]


def _on_a_gpu(monkeypatch, version: int | None) -> None:
    """Lets the parent backend be found as on a GPU, whose build of vLLM has a version of FlashAttention, or none."""
    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True, get_device_name=lambda: "NVIDIA A100")
    monkeypatch.setattr("tidaldecode.vllm.own_backend.current_platform", platform)
    monkeypatch.setattr("vllm.v1.attention.backends.fa_utils.get_flash_attn_version", lambda: version)


def _config(dtype: torch.dtype, **settings: str) -> SimpleNamespace:
    model = SimpleNamespace(dtype=dtype)
    return SimpleNamespace(model_config=model, additional_config={"tidaldecode": settings})


@pytest.mark.parametrize(
    ("version", "config", "flash"),
    [
        (3, _config(torch.bfloat16), True),
        (3, _config(torch.float32), False),
        (3, _config(torch.bfloat16, vllm_attention="TRITON_ATTN"), False),
        (None, _config(torch.bfloat16), False),
    ],
    ids=["there", "of another dtype", "not asked for", "not there"],
)
def test_flash_attention_is_the_parent_where_it_is_there(monkeypatch, version, config, flash):
    from tidaldecode.vllm.own_backend import _takes_flash_attention

    _on_a_gpu(monkeypatch, version)
    monkeypatch.setattr("vllm.config.get_current_vllm_config_or_none", lambda: config)
    with _lines() as lines:
        assert _takes_flash_attention() == flash
    assert [line for line in lines if "no FlashAttention for NVIDIA A100" in line] == (lines if version is None else [])
    assert len(lines) == (version is None)


def test_flash_attention_that_is_asked_for_and_not_there_is_refused(monkeypatch):
    from tidaldecode.vllm.own_backend import _takes_flash_attention

    _on_a_gpu(monkeypatch, None)
    config = _config(torch.bfloat16, vllm_attention="FLASH_ATTN")
    monkeypatch.setattr("vllm.config.get_current_vllm_config_or_none", lambda: config)
    with pytest.raises(InputError, match="no FlashAttention for NVIDIA A100: leave vllm_attention out") as caught:
        _takes_flash_attention()
    assert "\n" not in str(caught.value)


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def _lines() -> Iterator[list[str]]:
    """The lines that are logged."""
    handler, logger = _Lines(), logging.getLogger("vllm.tidaldecode")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def test_a_line_says_what_the_plan_does_and_what_was_read(start, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("tidaldecode.serving.read_counts._SECONDS", 0)
    monkeypatch.setattr("vllm.logger.dictConfig", lambda config: None)  # of a process's first engine: it ends `_lines`
    with _lines() as lines:
        engine = start(tiny_llama, **with_plan(tiny_plan(tmp_path, 32, "unified")))
        greedy(engine, [list(range(2, 102))], 4)
    assert sum("1 full layers, 2 select layers, 4 sparse layers" in line for line in lines) == 1
    assert "of the KV cache" in lines[-1]
    assert attention_of(engine).read_counts.decoded == 3
