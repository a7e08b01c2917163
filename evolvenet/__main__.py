"""`python -m evolvenet`: the command `evolvenet`."""

from evolvenet.cli.app import main

if __name__ == "__main__":
    main()
