"""`tidaldecode cache`: lists the models that were fetched or converted, and deletes them."""

from __future__ import annotations

from typing import Annotated

from rich.console import Console
from rich.text import Text

from tidaldecode.cli.command import command
from tidaldecode.cli.output import Json, print_json
from tidaldecode.errors import InputError
from tidaldecode.models.cache import cache_folder, cached_models, delete_model, delete_unfinished
from tidaldecode.options import Option


@command
def cache(
    names: Annotated[
        list[str] | None, Option("These alone. Default: all.", metavar="[NAME]...", positional=True)
    ] = None,
    clear: Annotated[bool, Option("Delete them; the next start makes anew what it needs.")] = False,
    json_output: Json = False,
) -> None:
    """Lists the models that lie in the cache folder, or deletes them: the demo model, and GGUF files as safetensors.

    The folder is TIDALDECODE_CACHE, or the user's cache folder.
    """
    models = cached_models()
    if unknown := set(names or ()) - {model.name for model in models}:
        there = ", ".join(model.name for model in models) or "no model"
        raise InputError(f"no model {min(unknown)!r} in {cache_folder()}: it holds {there}")
    chosen = [model for model in models if not names or model.name in names]
    if clear:
        for model in chosen:
            delete_model(model)
        if not names:
            delete_unfinished()
    console = Console(stderr=True, highlight=False)
    console.print(Text(f"{'deleted from' if clear else 'in'} {cache_folder()}:"), soft_wrap=True)
    for model in chosen:
        origin = f", from {model.made_from}" if model.made_from else ""
        console.print(Text(f"{model.num_bytes / 1e6:>10,.0f} MB  {model.name}{origin}"), soft_wrap=True)
    console.print(f"{sum(model.num_bytes for model in chosen) / 1e6:>10,.0f} MB  in all")
    rows = [{"name": model.name, "bytes": model.num_bytes, "made_from": model.made_from} for model in chosen]
    print_json(json_output, {"folder": str(cache_folder()), "cleared": clear, "models": rows})
