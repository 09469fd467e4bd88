/* Both ends of the UDP case, fast enough not to be what is measured; bench/datagrams.py does the same where there is no
 * compiler.
 *
 * datagrams echo ADDRESS PORT                      sends back what comes
 * datagrams load ADDRESS PORT SOCKETS SECONDS SIZE one datagram out per socket; figures as JSON on stdout
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>

enum { BATCH = 32, LARGEST = 65536, KEPT = 1 << 22 };
static const double LOST_S = 0.5;

static double now(void)
{
	struct timespec at;

	clock_gettime(CLOCK_MONOTONIC, &at);
	return at.tv_sec + at.tv_nsec / 1e9;
}

static int by_value(const void *one, const void *other)
{
	float a = *(const float *)one, b = *(const float *)other;

	return (a > b) - (a < b);
}

static int echo(struct sockaddr_in address)
{
	static char data[BATCH][LARGEST];
	static struct sockaddr_in senders[BATCH];
	static struct iovec parts[BATCH];
	static struct mmsghdr messages[BATCH];
	int sock = socket(AF_INET, SOCK_DGRAM, 0);

	if (bind(sock, (struct sockaddr *)&address, sizeof(address))) {
		perror("bind");
		return 1;
	}
	for (;;) {
		for (int at = 0; at < BATCH; at++) {
			parts[at] = (struct iovec){data[at], LARGEST};
			messages[at].msg_hdr = (struct msghdr){
				.msg_name = &senders[at], .msg_namelen = sizeof(senders[at]),
				.msg_iov = &parts[at], .msg_iovlen = 1};
		}
		int count = recvmmsg(sock, messages, BATCH, MSG_WAITFORONE, NULL);
		for (int at = 0; at < count; at++)
			parts[at].iov_len = messages[at].msg_len;
		if (count > 0)
			sendmmsg(sock, messages, count, 0);
	}
}

static int load(struct sockaddr_in address, int sockets, double seconds, int size)
{
	static char data[LARGEST];
	struct epoll_event ready[BATCH];
	float *took_us = malloc(KEPT * sizeof(float));
	double *sent_at = calloc(sockets, sizeof(double));
	int *descriptors = calloc(sockets, sizeof(int));
	int poller = epoll_create1(0);
	long done = 0, lost = 0;
	double start = now(), end = start + seconds, look_at = start + LOST_S, at = start;

	for (int i = 0; i < sockets; i++) {
		struct epoll_event event = {.events = EPOLLIN, .data.u32 = i};

		descriptors[i] = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
		connect(descriptors[i], (struct sockaddr *)&address, sizeof(address));
		epoll_ctl(poller, EPOLL_CTL_ADD, descriptors[i], &event);
		sent_at[i] = now();
		send(descriptors[i], data, size, 0);
	}
	while (at < end) {
		int count = epoll_wait(poller, ready, BATCH, 50);

		for (int each = 0; each < count; each++) {
			int i = ready[each].data.u32;

			if (recv(descriptors[i], data, LARGEST, 0) != size)
				continue;
			at = now();
			if (done < KEPT)
				took_us[done] = (at - sent_at[i]) * 1e6;
			done++;
			sent_at[i] = at;
			send(descriptors[i], data, size, 0);
		}
		at = now();
		if (at < look_at)
			continue;
		look_at = at + LOST_S;
		for (int i = 0; i < sockets; i++) {
			if (at - sent_at[i] > LOST_S) {
				lost++;
				sent_at[i] = at;
				send(descriptors[i], data, size, 0);
			}
		}
	}
	long kept = done < KEPT ? done : KEPT;
	qsort(took_us, kept, sizeof(float), by_value);
	printf("{\"requests\": %ld, \"elapsed_s\": %.6f, \"p50_us\": %.1f, \"p99_us\": %.1f, \"max_us\": %.1f, \"lost\": %ld}\n",
	       done, now() - start, kept ? took_us[kept / 2] : 0.0, kept ? took_us[(long)(kept * 0.99)] : 0.0,
	       kept ? took_us[kept - 1] : 0.0, lost);
	return 0;
}

int main(int count, char **words)
{
	struct sockaddr_in address = {.sin_family = AF_INET};

	if (count < 4 || inet_pton(AF_INET, words[2], &address.sin_addr) != 1)
		return 2;
	address.sin_port = htons(atoi(words[3]));
	if (!strcmp(words[1], "echo"))
		return echo(address);
	return count == 7 ? load(address, atoi(words[4]), atof(words[5]), atoi(words[6])) : 2;
}
