"""Feature dictionaries made from observed activations, as SAELens SAEs.

Importing the package registers its architectures, after which ``SAE.load_from_disk``, ``SAE.from_pretrained`` and
``SAE.from_dict`` return its classes. The public names are listed in ``__init__.pyi`` and imported when first used, so
that the import adds little to that of SAELens.
"""

import lazy_loader

from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition, ExemplarPartitionConfig
from saelens_ext.dictionaries.registering import register as _register
from saelens_ext.dictionaries.snmf import SNMFDictionary, SNMFDictionaryConfig

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

_register(
    {
        "exemplar_partition": (ExemplarPartition, ExemplarPartitionConfig),
        "snmf": (SNMFDictionary, SNMFDictionaryConfig),
    }
)
