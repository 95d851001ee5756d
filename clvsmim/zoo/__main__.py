"""`python -m clvsmim.zoo`."""

from clvsmim import cli, zoo

if __name__ == "__main__":
    cli.run(zoo)
