from .circuits import *
from .figures import *
from .figures import plt
from .html import *
