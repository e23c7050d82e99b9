"""The table of orders, as ``manage.py makemigrations`` made it."""

from typing import Any, ClassVar

from django.db import migrations, models


class Migration(migrations.Migration):
    initial = True

    operations: ClassVar[list[Any]] = [
        migrations.CreateModel(
            name="Order",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("user", models.CharField(max_length=100)),
                ("total", models.FloatField()),
                ("packed", models.BooleanField(default=False)),
                ("paid", models.BooleanField(default=False)),
            ],
        ),
    ]
