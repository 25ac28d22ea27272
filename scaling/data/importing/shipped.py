"""Schema files of public logs that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

from recscale.pallas_kernels.names import nearest

FOLDER = Path(__file__).parent / "schemas"


def list_schemas() -> list[str]:
    """Names of the shipped schema files."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def schema_path(name: str) -> Path:
    """The schema file of that path or shipped name.

    Raises:
        FileNotFoundError: neither; the nearest name is in the message.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = FOLDER / f"{name.removesuffix('.toml')}.toml"
    if not shipped.is_file():
        known = list_schemas()
        raise FileNotFoundError(f"there is no schema file {name}{nearest(name, known)}; shipped: {', '.join(known)}")
    return shipped
