/* One layer of a network, from weights that are licensed: `story.sh` sells them and runs this.
 *
 *   layer WEIGHTS < inputs        four numbers on each line; three come out, or why not
 *
 * It knows nothing of packages and keys: WEIGHTS is a path to memory, and the license is asked at a socket.
 */
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <hwlicense.h>

enum { INPUTS = 4, OUTPUTS = 3 };

int main(int count, char **arguments)
{
    struct hwlicense_refusal refusal;
    struct stat status;
    const float *weights;
    float in[INPUTS];
    int license, file, row, column;

    if (count != 2) {
        fprintf(stderr, "usage: layer WEIGHTS\n");
        return 2;
    }
    license = hwlicense_connect();
    if (license < 0) {
        perror("hwlicense");
        return 3;
    }
    file = open(arguments[1], O_RDONLY);
    if (file < 0 || fstat(file, &status) || (size_t)status.st_size != sizeof(float) * INPUTS * OUTPUTS) {
        fprintf(stderr, "%s is no layer of %d by %d\n", arguments[1], OUTPUTS, INPUTS);
        return 2;
    }
    weights = mmap(0, (size_t)status.st_size, PROT_READ, MAP_SHARED, file, 0); /* no copy is made */
    if (weights == MAP_FAILED) {
        perror("mmap");
        return 2;
    }
    while (scanf("%f %f %f %f", in, in + 1, in + 2, in + 3) == INPUTS) {
        switch (hwlicense_spend(license, 1, &refusal)) {
        case 0:
            break;
        case 1:
            printf("refused: %s\n", refusal.reason);
            continue;
        default:
            perror("hwlicense");
            return 3;
        }
        for (row = 0; row < OUTPUTS; row++) {
            float sum = 0;
            for (column = 0; column < INPUTS; column++)
                sum += weights[row * INPUTS + column] * in[column];
            printf(row + 1 < OUTPUTS ? "%g " : "%g\n", sum);
        }
        fflush(stdout);
    }
    return 0;
}
