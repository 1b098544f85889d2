"""Docstrings as the site's parser takes them; the house's form stays in the sources."""

import re

import griffe

TOGETHER = re.compile(r"^  ((?:\w+, )+\w+): (.*(?:\n {3,}\S.*)*)", re.M)


def _apart(found: re.Match) -> str:
    return "\n".join(f"  {name}: {found[2]}" for name in found[1].split(", "))


class House(griffe.Extension):
    """``Example:`` holds doctests, and equations that follow each other are apart.

    A public module, class or function without a docstring fails the build.
    """

    def on_instance(self, *, obj, **kwargs):
        """Rewrites the docstring of every object before it is parsed."""
        del kwargs
        if obj.docstring is None:
            named = obj.is_module or obj.is_class or obj.is_function
            if named and not any(x.startswith("_") for x in obj.path.split(".")):
                raise ValueError(f"{obj.path} has no docstring")
            return
        text = obj.docstring.value
        text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.M)
        # Two names with one text, of which the parser takes the second for a type.
        text = TOGETHER.sub(_apart, text)
        # After the text of an equation, the next one begins a paragraph.
        text = re.sub(r"\$\$\n( *)\$\$", r"$$\n\n\1$$", text)
        obj.docstring.value = text
