"""Commands. Heavy libraries are imported by the command that needs them, so that --help answers at once."""
import sys
def main(): pass
