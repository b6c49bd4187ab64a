"""``gradualdiff site``: what a site's own people do at the site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gradualdiff.cli import audit
from gradualdiff.cli.output import JsonOption, console, print_json

app = typer.Typer(help="At a site: its signing key, its audits.", no_args_is_help=True)
app.add_typer(audit.app, name="audit")
SiteArgument = Annotated[Path, typer.Argument(help="The site's site.toml.")]
IDENTITY_FILE = "identity.key"


@app.callback()
def _group() -> None:
    """At a site: its signing key, its audits."""


@app.command()
def init(site: SiteArgument = Path("site.toml"), as_json: JsonOption = False) -> None:
    """Make this site's signing key, once, and say its public half; repeated, say it again.

    The private half stays in a file that only you can read. Send the public half to whoever runs
    the coordinator, and read the fingerprint out over the phone.
    """
    from shared.trust.keys import SigningKey

    trust = _trust_table(site)
    path = site.resolve().parent / str(trust.get("key_file", IDENTITY_FILE))
    public = SigningKey.kept(path, "trust.key_file").public
    lines = "" if "key_file" in trust else f'[trust]\nkey_file = "{IDENTITY_FILE}"\n'
    if lines and site.exists() and not trust:
        _append(site, lines)
        lines = ""
    if as_json:
        told = {"key": public.text, "fingerprint": public.fingerprint, "file": str(path)}
        print_json(told)
        return
    out = console()
    out.print(f"private key  {path}; keep it here, and keep it to yourself", soft_wrap=True)
    out.print(f"public key   {public.text}", soft_wrap=True)
    out.print(f"fingerprint  {public.fingerprint}")
    if lines:
        out.print(f"add to {site}:\n{lines.rstrip()}", markup=False, soft_wrap=True)
    out.print(
        "next: send the public key to whoever runs the coordinator, and read the fingerprint out "
        "over the phone",
        soft_wrap=True,
    )


def _trust_table(site: Path) -> dict[str, Any]:
    """``[trust]`` of a site.toml that need not be filled in yet; nothing where there is no file."""
    import tomllib

    from shared.errors import ConfigError

    try:
        found = tomllib.loads(site.read_text(encoding="utf-8")).get("trust", {})
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{site}: expected a site.toml, but: {error}; fix the file") from None
    return found if isinstance(found, dict) else {}


def _append(site: Path, lines: str) -> None:
    with site.open("a", encoding="utf-8") as file:
        file.write(f"\n{lines}")
