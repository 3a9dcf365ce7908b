"""What is asked of the model, and what is made of its answer."""

from fabe_ds.prompts.answer import clean_answer
from fabe_ds.prompts.template import Instruction, load_instruction

__all__ = ["Instruction", "clean_answer", "load_instruction"]
