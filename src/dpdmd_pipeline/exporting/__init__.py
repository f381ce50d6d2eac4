"""What a student becomes outside of this project, as files of other programs; and pictures from any of them."""
