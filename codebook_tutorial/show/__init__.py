from .circuits import *
from .figures import *
from .figures import plt as plt
from .html import *
