"""Questions put to models and routers, and their answers as values.

study = moe.study.load("runs/a")
study.domain_specialisation().plot()
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe.study.study import Study, load

__all__ = ["Study", "load"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: commands that study nothing need not wait for pyarrow.
    if name in __all__:
        from moe.study import study

        return getattr(study, name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
