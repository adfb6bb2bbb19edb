"""A compiler that changes the results of modules instead of compiling them."""

from torch import nn


def compile_to(monkeypatch, change):
    """Replace torch's compilation of modules: a compiled module changes its results by a function."""

    def compile_module(self, dynamic):
        def run(*arguments):
            return change(type(self).forward(self, *arguments))

        self._compiled_call_impl = run

    monkeypatch.setattr(nn.Module, "compile", compile_module)
