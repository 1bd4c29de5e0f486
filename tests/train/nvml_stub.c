/* Three functions of NVML (nvml.h) for a machine without a card. What the "card" answers stands in
   files: FOLDER/energy_mj and FOLDER/power_mw, FOLDER being the environment's NVML_STUB. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int card = 7;

static int number(const char *name, unsigned long long *value) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%s", getenv("NVML_STUB"), name);
  FILE *file = fopen(path, "r");
  if (!file) return 3; /* NVML_ERROR_NOT_SUPPORTED */
  int found = fscanf(file, "%llu", value);
  fclose(file);
  return found == 1 ? 0 : 999; /* NVML_ERROR_UNKNOWN */
}

int nvmlInit_v2(void) { return 0; }

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
  if (strcmp(uuid, "GPU-12345678")) return 6; /* NVML_ERROR_NOT_FOUND */
  *device = &card;
  return 0;
}

int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *energy) {
  return device == &card ? number("energy_mj", energy) : 2; /* NVML_ERROR_INVALID_ARGUMENT */
}

int nvmlDeviceGetPowerUsage(void *device, unsigned int *power) {
  unsigned long long value = 0;
  int code = device == &card ? number("power_mw", &value) : 2;
  *power = (unsigned int)value;
  return code;
}
