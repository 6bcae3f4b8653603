"""Heavy thinking: K trajectories of one question become one better answer."""

from qad.think.best import Scorer
from qad.think.deliberation import deliberate
from qad.think.engine import think
from qad.think.events import Event
from qad.think.options import ThinkOptions
from qad.think.thought import Thought
from qad.think.vote import Vote, vote

__all__ = ["Event", "Scorer", "ThinkOptions", "Thought", "Vote", "deliberate", "think", "vote"]
