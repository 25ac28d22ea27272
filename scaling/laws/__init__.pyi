"""Public names of `recscale.scaling.laws`, for type checkers and for loading each on first use: their one list."""

from . import forms as forms
from .comparing.compare import compare as compare
from .fitting.fit import fit as fit
from .fitting.law_fit import LawFit as LawFit
from .fitting.law_fit import Refused as Refused
from .fitting.optimum import optimum as optimum
from .fitting.record import record as record
