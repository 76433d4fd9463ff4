"""How does every command take ``--plugin``?"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

Plugin = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        help="Python file or module that registers encoders, connectors, routers, metrics, generators, data formats … (repeatable).",
        show_default=False,
    ),
]


def add_plugin_option(app: typer.Typer) -> None:
    """Give every command of ``app`` and of its groups the option; the plug-ins are known before the command begins."""
    for command in app.registered_commands:
        if command.callback is not None:
            command.callback = _taking_plugins(command.callback)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            add_plugin_option(group.typer_instance)


def _taking_plugins(command: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def with_plugins(*args: Any, plugin: list[str] | None = None, **kwargs: Any) -> Any:
        from mllm.plugins import use_plugins

        use_plugins(plugin or [])
        return command(*args, **kwargs)

    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("plugin", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Plugin)
    with_plugins.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    with_plugins.__annotations__ = {
        **{name: each.annotation for name, each in signature.parameters.items()},
        "plugin": Plugin,
    }
    return with_plugins
