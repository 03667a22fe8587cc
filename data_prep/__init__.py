"""Readers of public raw formats, by the name the command line gives them."""

from data_prep.preparation import Plan, PrepareSummary, prepare
from data_prep.reader import READERS, Reader, reader
from stdist.data import Day, Part

__all__ = ["READERS", "Day", "Part", "Plan", "PrepareSummary", "Reader", "prepare", "reader"]
