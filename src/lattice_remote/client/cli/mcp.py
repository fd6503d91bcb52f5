"""``lattice remote mcp``: lattice's MCP server, for projects with and without a remote."""

import typer

from lattice_remote.errors import Misuse

__all__ = ["app"]

app = typer.Typer(rich_markup_mode=None)


@app.command()
def mcp() -> None:
    """Serve lattice's MCP tools and resources over stdio, in a project with or without a remote.

    They are those of lattice-mcp; their writes run on the project's server. Use this command instead of lattice-mcp in
    the settings of your MCP client.

    Example: claude mcp add lattice -- lattice remote mcp
    """
    try:
        from lattice_remote.client.surfaces.mcp import serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "mcp":
            raise
        raise Misuse("the MCP server needs another package: pip install 'lattice-remote[mcp]'") from None
    serve()
