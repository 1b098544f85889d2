"""Hooks of the site: pages that are generated from the code, links, equations.

The start page is the README, the changelog CHANGELOG.md, a system's page comes from its
module, its row of the README and its config, the reference from the public names. So
nothing is written twice, and a name without a docstring or a dead link fails the build.
"""

import functools
import html
import importlib
import inspect
import json
import pkgutil
import re
import sys
import textwrap
import tomllib
from pathlib import Path

from latex2mathml import converter
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results"
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
BLOB = URLS["Repository"] + "/blob/main/"
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
MATH = re.compile(r'<(div|span) class="arithmatex">(.*?)</\1>', re.S)
CLICKS = ("click_models", "click_models")
# System -> its picture and the JSON beside it, whose command made both, or the command.
PICTURES = {
    "dion": ("dion_vs_adamw_muon", "dion_vs_adamw_muon"),
    "din": CLICKS,
    "dien": CLICKS,
    "sim": CLICKS,
    "rocket": CLICKS,
    "r3_vae": ("r3_vae", "r3_vae"),
    "defer": ("delayed_feedback", "delayed_feedback"),
    "sft_pg": ("diffusion_swiss_roll", "diffusion_swiss_roll"),
    "dpok": ("diffusion_dpok", "diffusion_dpok"),
    "score_wasserstein": ("diffusion_certificate", "diffusion_certificate"),
    "poem": ("poem_mined", "poem"),
    "nuclear_norm": ("nuclear_norm_signs", "nuclear_norm_signs"),
    "gppstd": ("gppstd_deep_sea", "gppstd_deep_sea"),
    "mpc_psrl": ("mpc_psrl_cartpole_light", "mpc_psrl_cartpole_light"),
    "looped_transformer": ("looped_parity", "looped_parity"),
    "versaprm": ("versaprm", "versaprm"),
    "rejump": ("rejump", "jaxpapers run rejump --seeds 3"),
    "coda": ("coda_learning", "coda_rooms"),
    "dnw": ("dnw_usage", "jaxpapers run dnw"),
    "peer_review": ("peer_review_coefficients", "jaxpapers run peer_review"),
}
LIBRARIES = ("linen", "nnx", "equinox")
PACKAGES = ("ops", "nets")
MODULES = ("study", "outcome", "run", "train", "trackers", "mesh", "plan", "hlo")


def on_config(config):
    """The pages of generated folders, in the navigation."""
    for item in config.nav:
        if "Systems" in item:
            item["Systems"] = sorted(systems(), key=lambda x: x != "systems/index.md")
        if "Reference" in item:
            pages = sorted(reference(), key=lambda x: x != "api/index.md")
            item["Reference"] = _tree(pages)
    return config


def _tree(pages: list[str]) -> list:
    """Pages of packages in a group of their own."""
    groups: dict[str, list[str]] = {}
    for page in pages:
        parts = page.split("/")
        groups.setdefault(parts[1] if len(parts) > 2 else "", []).append(page)
    return [*groups.pop(""), *({name: found} for name, found in groups.items())]


def on_files(files, config):
    """Adds the generated pages and the pictures that pages show."""
    pages = {
        "index.md": (ROOT / "README.md").read_text(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(),
        "gallery.md": gallery(),
        **systems(),
        **reference(),
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    for path in sorted(RESULTS.glob("*.png")):
        place = f"benchmarks/results/{path.name}"
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links of the repository become links of the site, or of its public copy."""
    here = page.file.src_uri
    up = "../" * here.count("/")
    outside = here in ("index.md", "changelog.md")

    def link(match):
        target = match[2]
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, _, anchor = target.partition("#")
        anchor = f"#{anchor}" if anchor else ""
        if outside:
            base = ROOT
        elif here.startswith(("systems/", "api/")) or here == "gallery.md":
            return match[0]
        else:
            base = (ROOT / "docs" / here).parent
        place = (base / path).resolve().relative_to(ROOT).as_posix()
        return match[1] + up + _place(place, files) + anchor + match[3]

    markdown = LINK.sub(link, markdown)
    return _tabs(markdown) if here.startswith("notebooks/") else markdown


def _tabs(markdown: str) -> str:
    """Sections of a notebook that are of one library each, as tabs."""
    head, *sections = re.split(r"^## ", markdown, flags=re.M)
    made, inside = [head], False
    for section in sections:
        title, _, body = section.partition("\n")
        tab = title in LIBRARIES
        if tab and not inside:
            made.append("## In your library\n\n")
        body = textwrap.indent(body, "    ") if tab else body
        made.append(f'=== "{title}"\n\n{body}' if tab else f"## {section}")
        inside = tab
    return "".join(made)


def _place(path: str, files) -> str:
    """Where a file of the repository is on the site."""
    names = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
    paper = re.match(r"jaxpapers/papers/(\w+)(\.py|/__init__\.py)$", path)
    if paper:
        return f"systems/{paper[1]}.md"
    if path in names:
        return names[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("benchmarks/results/") and path.endswith(".png"):
        return path
    if not (ROOT / path).exists():
        raise PluginError(f"a link to {path}, which is not there")
    return BLOB + path


def on_page_content(html_text, page, config, files):
    """Equations as MathML, which browsers draw themselves."""

    def convert(match):
        text = html.unescape(match[2]).strip()
        block = match[1] == "div"
        latex = text[2:-2].strip()
        try:
            found = converter.convert(latex, display="block" if block else "inline")
        except Exception as e:
            raise PluginError(f"{page.file.src_uri}: cannot draw {latex!r}: {e}") from e
        return f'<{match[1]} class="equation">{found}</{match[1]}>'

    return MATH.sub(convert, html_text)


@functools.cache
def _rows() -> dict[str, list[str]]:
    """Paper -> cells of its row in the README."""
    rows = {}
    for line in (ROOT / "README.md").read_text().splitlines():
        found = re.match(r"\| \[.*\]\(jaxpapers/papers/(\w+)", line)
        if found:
            rows[found[1]] = [x.strip() for x in line.strip("|").split(" | ")]
    return rows


def _short(name: str) -> str:
    """What the README calls a system."""
    short = re.match(r"\[(.*?)\]", _rows()[name][0])[1]
    return short[0].upper() + short[1:]


def systems() -> dict[str, str]:
    """A page for each system, and one that lists them."""
    from jaxpapers import papers

    pages, rows = {}, _rows()
    listed = [
        "# Systems",
        "",
        "| system | paper | field | one result |",
        "|---|---|---|---|",
    ]
    for name, paper in papers.NAMES.items():
        if name not in rows:
            raise PluginError(f"the README's table has no row of {name}")
        _, field, command, result, cost = rows[name]
        short = _short(name)
        listed.append(f"| [{short}]({name}.md) | {paper.title} | {field} | {result} |")
        pages[f"systems/{name}.md"] = "\n".join(
            [
                f"# {short}",
                "",
                f"*{paper.title}*, {_reference(paper)}",
                "",
                f"**Result.** {result}. Command: {command}; {cost}.",
                "",
                *_picture(name),
                f"::: jaxpapers.papers.{name}",
                "    options:",
                "      show_root_heading: false",
                "      show_root_toc_entry: false",
                "",
                *_fields(name),
                "## Cite",
                "",
                "```bibtex",
                papers.bibtex(name).strip(),
                "```",
                "",
            ]
        )
    pages["systems/index.md"] = "\n".join(listed) + "\n"
    return pages


def _reference(paper) -> str:
    if not paper.arxiv:
        return paper.reference
    return f"[arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})"


def _picture(name: str) -> list[str]:
    file, command = _made(name)
    return [f"![{name}](../{file})", "", f"Made by `{command}`.", ""]


def _made(name: str) -> tuple[str, str]:
    """A system's picture, and the command that made it."""
    if name not in PICTURES:
        raise PluginError(f"{name} has no picture: name one in PICTURES")
    picture, record = PICTURES[name]
    file = f"benchmarks/results/{picture}.png"
    if not (ROOT / file).exists():
        raise PluginError(f"the picture of {name}, {file}, is not there")
    if " " in record:
        return file, record
    content = json.loads((RESULTS / f"{record}.json").read_text())
    if "command" not in content:
        raise PluginError(f"{record}.json does not say by which command it was made")
    return file, content["command"]


def _fields(name: str) -> list[str]:
    """Every field of a system's config: default and meaning."""
    from jaxpapers.config import load_config
    from jaxpapers.describe import describe

    lines = [
        "## Fields of its config",
        "",
        f"`jaxpapers run {name} --config.GROUP.FIELD=VALUE`; defaults are those of the "
        "preset without a name.",
        "",
        "| field | default | what it is |",
        "|---|---|---|",
    ]
    for field in describe(name, load_config(name)):
        text = field.text.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| `{field.name}` | `{field.value!r}` | {text} |")
    return [*lines, ""]


def gallery() -> str:
    """Every picture, with the systems that are in it."""
    shown: dict[tuple[str, str], list[str]] = {}
    for name in PICTURES:
        shown.setdefault(_made(name), []).append(name)
    lines = ["# Gallery", ""]
    for (file, command), names in shown.items():
        links = ", ".join(f"[{_short(name)}](systems/{name}.md)" for name in names)
        lines += [f"## {links}", "", f"![{names[0]}]({file})", "", f"`{command}`", ""]
    return "\n".join(lines)


def reference() -> dict[str, str]:
    """Pages of the public names, which all have docstrings."""
    pages = {
        "api/optim.md": _page("optim", "jaxpapers.optim", _public("jaxpapers.optim")),
        "api/method.md": _page(
            "method", "jaxpapers.method", _public("jaxpapers.method")
        ),
    }
    for name in MODULES:
        pages[f"api/{name}.md"] = f"# {name}\n\n::: jaxpapers.{name}\n"
    for package in PACKAGES:
        module = importlib.import_module(f"jaxpapers.{package}")
        for found in pkgutil.walk_packages(module.__path__, f"{module.__name__}."):
            if found.name.rpartition(".")[2].startswith("_"):
                continue
            short = found.name.removeprefix("jaxpapers.")
            pages[f"api/{short.replace('.', '/')}.md"] = (
                f"# {short}\n\n::: {found.name}\n"
            )
    listed = ["# Reference", ""]
    for path in sorted(pages):
        title = path.removeprefix("api/").removesuffix(".md").replace("/", ".")
        listed.append(f"- [{title}]({path.removeprefix('api/')})")
    pages["api/index.md"] = "\n".join(listed) + "\n"
    return pages


def _public(name: str) -> list[str]:
    """Where each public name of a package is defined: a function may share a module's."""
    module, places = importlib.import_module(name), []
    for public in module.__all__:
        value = getattr(module, public)
        if isinstance(value, functools.partial):
            places.append(f"{value.func.__module__}.{public}")
            continue
        if not inspect.getdoc(value):
            raise PluginError(f"{name}.{public} has no docstring")
        places.append(f"{value.__module__}.{public}")
    return places


def _page(title: str, module: str, names: list[str]) -> str:
    parts = [
        f"# {title}",
        "",
        f"::: {module}",
        "    options:",
        "      members: false",
        "",
    ]
    parts += [f"::: {name}\n" for name in names]
    return "\n".join(parts)
