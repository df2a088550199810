"""From a checkpoint or a GGUF file to a GGUF file with tables of inverse frequencies.

Heavy packages (torch, transformers) are imported only where a conversion needs them.
"""

from clex_convert.convert import ConversionResult, convert, sizes
from clex_convert.errors import ConvertError
from clex_convert.job import Size
from clex_convert.methods import tables

__all__ = ["ConversionResult", "ConvertError", "Size", "convert", "sizes", "tables"]
