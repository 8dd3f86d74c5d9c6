{{/* The pod of a server. With nodes above 1, `role` is leader or worker. */}}
{{- define "qvq.pod" -}}
{{- $root := .root }}
{{- $role := .role }}
{{- $v := $root.Values }}
{{- $plan := include "qvq.plan" $root | fromYaml }}
{{- $nodes := int $v.nodes }}
{{- $gpus := div (int $plan.gpus) $nodes -}}
metadata:
  labels:
    {{- include "qvq.server" $root | nindent 4 }}
    {{- if eq $role "worker" }}
    qvq-serve/role: worker
    {{- else }}
    qvq-serve/role: api
    {{- end }}
  annotations:
    # A changed profile starts the pods again.
    qvq-serve/profile: {{ include "qvq.profile" $root | sha256sum | trunc 16 }}
    {{- with $v.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- include "qvq.podSecurity" (merge (dict "listens" true) $root) | nindent 2 }}
  # preStop, then the drain of running answers, then the engine's end.
  terminationGracePeriodSeconds: {{ $plan.graceSeconds }}
  {{- with $v.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $v.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $v.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $v.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $v.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if $v.topologySpread }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels: {{- include "qvq.server" $root | nindent 10 }}
  {{- end }}
  {{- if include "qvq.downloads" $root }}
  initContainers:
    - name: wait-for-weights
      image: {{ include "qvq.image" $root }}
      imagePullPolicy: {{ $v.image.pullPolicy }}
      command: [qvq-serve, download, --wait, --model, {{ (include "qvq.launch" $root | fromYaml).model }}]
      env: {{- include "qvq.env" (dict "own" "[{name: QVQ_CACHE, value: /models}]" "extra" $v.extraEnv) | trim | nindent 8 }}
      resources:
        requests: {cpu: 100m, memory: 256Mi}
        limits: {memory: 1Gi}
      {{- include "qvq.containerSecurity" $root | nindent 6 }}
      volumeMounts:
        - {name: models, mountPath: /models, readOnly: true}
  {{- end }}
  containers:
    - name: server
      image: {{ include "qvq.image" $root }}
      imagePullPolicy: {{ $v.image.pullPolicy }}
      command: [qvq-serve]
      args:
        {{- if gt $nodes 1 }}
        - node
        - --join-timeout={{ $plan.startupSeconds }}
        - $(LWS_WORKER_INDEX)
        - {{ $nodes | quote }}
        - $(LWS_LEADER_ADDRESS)
        {{- else }}
        - serve
        {{- end }}
        - --config
        - /etc/qvq/profile.toml
        {{- if $v.vllmArgs }}
        - --
        {{- end }}
        {{- range $v.vllmArgs }}
        - {{ . | quote }}
        {{- end }}
      env: {{- include "qvq.env" (dict "own" (include "qvq.serverEnv" $root) "extra" $v.extraEnv) | trim | nindent 8 }}
      {{- if ne $role "worker" }}
      ports:
        - {name: http, containerPort: {{ $v.service.port }}}
        - {name: metrics, containerPort: {{ $v.service.metricsPort }}}
      startupProbe:  # three times the measured start
        httpGet: {path: /health, port: http}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: {{ div (add $plan.startupSeconds 9) 10 }}
      readinessProbe:  # a request with an image was answered, and no drain is on
        httpGet: {path: /ready, port: http}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 3
      livenessProbe:  # a dead engine ends the process by itself; this is for an API that says nothing for 5 minutes
        httpGet: {path: /health, port: http}
        periodSeconds: 30
        timeoutSeconds: 30
        failureThreshold: 10
      {{- end }}
      lifecycle:
        preStop:
          sleep: {seconds: 15}  # until proxies have taken the pod off their lists; it answers all the while
      resources:
        requests:
          cpu: {{ div (add $plan.cpus (sub $nodes 1)) $nodes | quote }}
          memory: {{ $plan.memoryGiB }}Gi
        limits:
          memory: {{ $plan.memoryGiB }}Gi
          {{- if $gpus }}
          nvidia.com/gpu: {{ $gpus | quote }}
          {{- end }}
      {{- include "qvq.containerSecurity" $root | nindent 6 }}
      volumeMounts:
        - {name: profile, mountPath: /etc/qvq, readOnly: true}
        {{- if include "qvq.hasWeights" $root }}
        - {name: models, mountPath: /models, readOnly: true}
        {{- end }}
        - {name: cache, mountPath: /cache}
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        {{- if $v.apiKeys.existingSecret }}
        - {name: keys, mountPath: /etc/qvq-keys, readOnly: true}
        {{- end }}
  volumes:
    - name: profile
      configMap: {name: {{ $root.Release.Name }}-profile}
    {{- if include "qvq.hasWeights" $root }}
    - {{ include "qvq.weightsVolume" $root | nindent 6 | trim }}
    {{- end }}
    - name: cache
      {{- if eq $v.compileCache.kind "claim" }}
      persistentVolumeClaim: {claimName: {{ $root.Release.Name }}-cache}
      {{- else }}
      emptyDir: {sizeLimit: {{ $v.compileCache.size }}}
      {{- end }}
    - name: tmp
      emptyDir: {sizeLimit: 10Gi}
    - name: shm  # what workers and NCCL pass to each other; counts as the container's memory
      emptyDir: {medium: Memory, sizeLimit: {{ $plan.shmGiB }}Gi}
    {{- if $v.apiKeys.existingSecret }}
    - name: keys
      secret: {secretName: {{ $v.apiKeys.existingSecret }}}
    {{- end }}
{{- end }}

{{/* The server's own environment variables, a list. */}}
{{- define "qvq.serverEnv" -}}
{{- $plan := include "qvq.plan" . | fromYaml }}
- {name: QVQ_HOST, value: 0.0.0.0}
- {name: QVQ_PORT, value: {{ .Values.service.port | quote }}}
- {name: QVQ_METRICS_PORT, value: {{ .Values.service.metricsPort | quote }}}
- {name: QVQ_DRAIN_TIMEOUT, value: {{ $plan.drainSeconds | quote }}}
- {name: QVQ_CACHE, value: /models}
# The writable places: all caches are on one volume, so that a restart does not compile again.
- {name: HOME, value: /cache}
- {name: XDG_CACHE_HOME, value: /cache}
- {name: VLLM_CACHE_ROOT, value: /cache/vllm}
- {name: TRITON_CACHE_DIR, value: /cache/triton}
- {name: TORCHINDUCTOR_CACHE_DIR, value: /cache/inductor}
{{- if .Values.apiKeys.existingSecret }}
- {name: QVQ_API_KEY_FILE, value: /etc/qvq-keys/keys}
{{- end }}
{{- if gt (int .Values.nodes) 1 }}
- name: VLLM_HOST_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- end }}
{{- range $key, $value := .Values.settings }}
{{- /* A values file's whole numbers are floats to Helm, which prints 1e+06. */}}
{{- $whole := and (kindIs "float64" $value) (eq (toString (floor $value)) (toString $value)) }}
- {name: QVQ_{{ upper $key }}, value: {{ ternary (int64 $value) $value $whole | toString | quote }}}
{{- end }}
{{- end }}
