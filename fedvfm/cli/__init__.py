"""The commands; each verb calls one function of a wing."""
