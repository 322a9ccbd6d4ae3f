"""Modules: the variational word mask, and the classifier that the paper trains."""

from safr_fast.nn.attention import SelfAttention
from safr_fast.nn.classifier import ClassifierOutput, SAFRClassifier, TransformerClassifier
from safr_fast.nn.vmask import VMASK

__all__ = ["VMASK", "ClassifierOutput", "SAFRClassifier", "SelfAttention", "TransformerClassifier"]
