"""Colours of the figures: Okabe and Ito's, and greys."""

SKY, ORANGE, GREEN, PINK, YELLOW, BLUE, VERMILION = "#56B4E9 #E69F00 #009E73 #CC79A7 #F0E442 #0072B2 #D55E00".split()
INK, GREY, PALE = "#1a1a1a", "#8a8a8a", "#d9d9d9"
