"""What is in the database."""

from django.db import models


class Order(models.Model):
    user = models.CharField(max_length=100)
    total = models.FloatField()
    packed = models.BooleanField(default=False)
    paid = models.BooleanField(default=False)
