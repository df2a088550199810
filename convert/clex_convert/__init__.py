"""From a checkpoint or a GGUF file to a GGUF file with tables of inverse frequencies.

Heavy packages (torch, transformers) are imported only where a conversion needs them.
"""

from clex_convert.convert import ConversionResult, convert
from clex_convert.errors import ConvertError
from clex_convert.method_tables import tables
from clex_convert.options import ConvertOptions
from clex_convert.sizes import Size, sizes

__all__ = ["ConversionResult", "ConvertError", "ConvertOptions", "Size", "convert", "sizes", "tables"]
