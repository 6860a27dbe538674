"""Every shape in the package's signatures is checked while the tests run."""

from jaxtyping import install_import_hook

# Before anything of ours is imported. An int may stand for a float, as PEP 484 says.
install_import_hook("litdiffusion", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
